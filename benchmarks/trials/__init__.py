"""What `reliability.py` tries: kills, faults and bad inputs."""
