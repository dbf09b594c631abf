"""What tasks that give labels to rows share: label facts, their loss, what validation settles, heads that are fitted."""
