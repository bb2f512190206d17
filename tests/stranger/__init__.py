"""What somebody outside of lowcomm would write."""
