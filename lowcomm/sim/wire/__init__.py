"""What carries words between simulated ranks: the clock, the links, and how messages use them."""
