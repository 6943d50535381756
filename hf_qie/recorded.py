"""What a run writes down of itself for those who come later: `run.json`, beside the recipe."""

RECORD = "run.json"
STATE = "trainer_state.json"  # Trainer's name; in the output folder it stands for a run that has ended
