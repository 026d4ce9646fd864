-- submit: accept a job and put its first delivery into the RQ queue, all at once or not at all.
--
-- KEYS  1 spec  2 state  3 open  4 the RQ queue's list  5 RQ's set of queues  6 the delivery's RQ job hash
-- ARGV  1 spec (JSON)  2 job id  3 lane  4 model  5 retention (ms)  6 max attempts  7 expires (ms from now, or '')
--       8 patience (ms): when a sweep first asks whether the queue entry is still there
--       9 the queue's name as RQ's set of queues holds it  10 RQ job id
--       11.. field, value, ... of the RQ job hash
-- Returns {'created' | 'exists' | 'conflict', status}, or {'full', bytes used, maxmemory}
-- A lost reply may be retried: the same spec under a known id is the same job and is not delivered twice.
-- The last tenth of maxmemory is kept for the jobs that are accepted already: their deliveries are taken, their answers
-- written, RQ's books kept. At maxmemory itself the server refuses this script before its first write. Either way nothing
-- is accepted halfway. A user who may not call INFO meets the second limit alone.
-- flags:

local held = redis.call('GET', KEYS[1])
if held then
  if held == ARGV[1] then
    return {'exists', redis.call('HGET', KEYS[2], 'status')}
  end
  return {'conflict', ''}
end

local memory = redis.pcall('INFO', 'memory') -- 8 us
if type(memory) == 'string' then
  local used, limit = string.match(memory, 'used_memory:(%d+)'), string.match(memory, '\nmaxmemory:(%d+)')
  if limit and tonumber(limit) > 0 and used + #ARGV[1] > limit * 0.9 then
    return {'full', used, limit}
  end
end

local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('SET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], 'seq', 0, 'status', 'queued', 'attempt', 0, 'broken', 0,
  'lane', ARGV[3], 'model', ARGV[4], 'created', now, 'retention', ARGV[5], 'max_attempts', ARGV[6])
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[2], 'expires', now + ARGV[7])
end
redis.call('ZADD', KEYS[3], now + ARGV[8], ARGV[2])

redis.call('HSET', KEYS[6], unpack(ARGV, 11))
redis.call('SADD', KEYS[5], ARGV[9])
redis.call('RPUSH', KEYS[4], ARGV[10])
return {'created', 'queued'}
