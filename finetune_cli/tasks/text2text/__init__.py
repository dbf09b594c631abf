"""What text2text-generation is made of: sources and references, decoding, its part of the report."""
