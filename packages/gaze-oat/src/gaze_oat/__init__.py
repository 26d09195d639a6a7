"""Where people look: object-level scanpath prediction, and every established scanpath metric."""
