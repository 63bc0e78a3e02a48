"""What the head costs: `make bench` runs `head` and `max_sim`, `tables` puts the results into README.md."""
