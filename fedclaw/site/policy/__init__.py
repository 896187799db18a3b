"""What a site lets leave, whatever a server asks: its policy, and the checks that hold a question against it."""
