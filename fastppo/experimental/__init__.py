"""The late PPO API, under the names of trl.experimental."""
