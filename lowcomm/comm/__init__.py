"""The wire: what ranks can say to each other, and who carries it."""
