"""Measurements on a GPU; ``all.sh`` runs them."""
