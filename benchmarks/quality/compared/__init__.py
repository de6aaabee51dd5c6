"""What is compared: our recipes, the rivals, and the parts of the method one at a time."""
