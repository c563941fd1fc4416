"""What a model reads of its cache: policies, their alignment with a draft's attention, and budgets."""
