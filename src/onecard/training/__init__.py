"""Short training that compression needs: quantisation-aware, and after pruning."""
