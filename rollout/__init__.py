"""The rollout service: drives the model through tasks, one durable event after another."""
