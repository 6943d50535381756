"""The recipe, `TrainingArguments`, and what the launcher adds to them."""
