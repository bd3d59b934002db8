"""The diffusion process: schedule, what the UNet predicts, and the loss."""
