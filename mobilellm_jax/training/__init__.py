"""Training: the step, the loop around it, and the checkpoints that let it stop and go on."""
