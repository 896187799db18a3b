"""The audit: attacks and measurements that tell a mechanism that is less private than it claims.

An audit runs the real site code and the real server code in this process and plays the adversary, who knows
everything but the one bit that is attacked. What it finds is a lower bound: above the claim it proves a fault; below,
it proves nothing.
"""
