"""Answers samples: prompts in, responses out, at any exit of the image encoder."""
