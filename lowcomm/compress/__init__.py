"""What of a vector is sent, and in which form."""
