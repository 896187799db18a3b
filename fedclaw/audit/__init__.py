"""The audit: attacks and measurements that expose a mechanism that is less private than it claims.

An audit runs the real code of the sites and the server in this process. The adversary knows everything except the one
bit under attack. The result is a lower bound on epsilon: above the claim it proves a fault, below it proves nothing.
"""
