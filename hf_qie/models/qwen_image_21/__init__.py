"""Qwen-Image-2.1: text-to-image and edits of one or more images with one checkpoint."""
