"""What methods share: rounds, exchanges and anchors."""
