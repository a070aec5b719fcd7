"""Budgets that promise quality: the smallest model that loses no more than was asked for."""
