"""What compressing a model needs: representative rows, a judge, and the layers that lose most."""
