"""Fine-tune Qwen-Image-Edit the Hugging Face way: extract once, train often."""
