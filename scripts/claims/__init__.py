"""The paper's claims, run again on Fashion-MNIST with small networks."""
