"""Tables and pictures from kept results."""
