"""What people see of runs: a table, and one HTML file that compares them."""
