"""Finding the δ of step switching."""
