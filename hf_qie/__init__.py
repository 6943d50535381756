"""Fine-tune Qwen-Image-Edit and Qwen-Image-2.1 the Hugging Face way: extract once, train often."""
