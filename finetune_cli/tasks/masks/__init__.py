"""What fill-mask is made of: which tokens are masked, the head over those alone, its part of the report."""
