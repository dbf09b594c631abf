"""What token-classification is made of: rows with words and tags, words to tokens and back, its part of the report."""
