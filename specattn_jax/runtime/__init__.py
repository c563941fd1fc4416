"""From prompts to text: the session around the jitted loop."""
