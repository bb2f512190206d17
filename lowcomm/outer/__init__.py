"""How the anchor follows the mean delta."""
