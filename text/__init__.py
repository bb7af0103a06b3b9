"""From files to paragraphs."""
