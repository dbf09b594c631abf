"""What text-generation is made of: prompts and supervision, blocks of running text, losses in chunks, generation."""
