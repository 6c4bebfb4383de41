"""Training further: fine-tuning and segmentation."""
