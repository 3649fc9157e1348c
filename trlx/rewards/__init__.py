"""Rewards: how the user's reward functions are called, and what is made of what they return."""
