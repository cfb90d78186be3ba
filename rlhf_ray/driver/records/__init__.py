"""What the loop keeps of an iteration's samples for people, and `driver.recorder` writes.

Read `samples`, which makes the records.
"""
