"""Gradient coding: workers compute more than their share, so that the sum is known without the slowest."""
