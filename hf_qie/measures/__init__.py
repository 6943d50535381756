"""Scores of images by numbers alone: how one is shifted against another, and how well an edit was made."""
