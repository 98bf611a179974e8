"""What models are trained and judged on: captioned and labelled pictures, embedding stores, pairs, built-in scenes."""
