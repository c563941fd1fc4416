"""What decoding costs, and which way of decoding is the fastest here."""
