-- forget: let Redis drop a finished job soon; who still reads it has the time given.
--
-- KEYS  1 state  2 log  3 spec
-- ARGV  1 ms it stays (60,000)
-- Returns {'forgotten'}  {'open', status}  {'unknown'}
-- flags: allow-oom
-- uses: _ending

local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return {'unknown'}
end
if not CLOSED[status] then
  return {'open', status}
end
if redis.call('PTTL', KEYS[1]) > tonumber(ARGV[1]) then
  for i = 1, 3 do
    redis.call('PEXPIRE', KEYS[i], ARGV[1])
  end
end
return {'forgotten'}
