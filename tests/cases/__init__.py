"""What ordinary users and attackers met, as small inputs to whole commands."""
