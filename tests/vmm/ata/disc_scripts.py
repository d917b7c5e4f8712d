"""What guests do when their disc is taken out, and when there is another: parts of scripts."""

EMPTY = """
exec 7<&-
dd if=/dev/sr0 of=/dev/null count=1 2>/dev/null; result empty $?
"""
CHANGED = """
n=0; until dd if=/dev/sr0 of=/dev/null bs=2k count=1 2>/dev/null || [ $n = 100 ]; do sleep 0.1; n=$((n+1)); done
result second $(md5sum </dev/sr0)
result larger $(cat /sys/block/sr0/size)
"""
