-- deliver: put a further delivery of a job into its RQ queue.
--
-- KEYS  1 the RQ queue's list  2 RQ's set of queues  3 the delivery's RQ job hash
-- ARGV  1 the queue's name as RQ's set of queues holds it  2 RQ job id  3 'first' or 'last': where it stands
--       4.. field, value, ... of the RQ job hash
-- Returns 1, or 0 when this very delivery is there already (a lost reply was retried).
-- First stands what was taken from the head before: somebody may be watching it, and a backlog must not be in its way. Of
-- several the oldest comes last, and so to the head. Last stands what had to wait for its upstream, whose jobs would
-- otherwise be in everybody's way.
-- flags: allow-oom

if redis.call('EXISTS', KEYS[3]) == 1 then
  return 0
end
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call(ARGV[3] == 'first' and 'LPUSH' or 'RPUSH', KEYS[1], ARGV[2])
return 1
