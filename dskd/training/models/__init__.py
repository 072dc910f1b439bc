"""The models in training.

pair            teacher and student on a rank
student         the student in a ZeRO-3 engine
teacher_source  what training reads of the teacher: a loaded teacher, or the shards
trunk_check     checks that the student computes what the teacher does above the layers that they share
width_map       maps the states of a student of another width to the teacher's
"""
