"""A task's data as rows and images, embedding sets, the mixture and its batches."""
