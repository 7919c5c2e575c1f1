"""Who answers: prompts in, responses out, at any exit of the image encoder."""
