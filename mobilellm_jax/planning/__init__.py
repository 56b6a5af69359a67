"""What a run will need and how fast it will be, found out without the hardware."""
