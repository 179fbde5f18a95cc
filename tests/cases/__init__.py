"""What ordinary users and attackers met, as small inputs to whole commands: each test says what it wants of its kind."""
